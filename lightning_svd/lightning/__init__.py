"""What touches Lightning and the loggers."""
