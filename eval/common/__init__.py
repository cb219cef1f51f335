"""Common parts of the protocols: models and images by name, features, scores, figures and results."""
