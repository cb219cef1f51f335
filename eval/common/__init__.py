"""Machinery that the protocols share: models and images by name, features, scores, figures, results."""
