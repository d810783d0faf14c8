"""A trained model made smaller without training: its layers cut by what its data uses."""
