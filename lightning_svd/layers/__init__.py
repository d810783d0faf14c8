"""What a factorized layer is."""
