"""What samples say: histograms, figures, duty cycles, advice."""
