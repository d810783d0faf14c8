"""What ranks carry and cost, and which to keep: numbers in, numbers out."""
