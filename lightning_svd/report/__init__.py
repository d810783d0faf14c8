"""What happened to a model, as data, text and pages."""
