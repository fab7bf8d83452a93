"""What statistics say: histograms and figures."""
