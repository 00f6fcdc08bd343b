"""How the pocket model is made: traces (data), vocabulary, network, training, export, evaluation."""
