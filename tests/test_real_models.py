"""Models that people use, built small and with random weights: trained, pruned, saved, loaded and exported."""
