"""What the demonstrations and the comparison share: data, networks, training, measures, figures."""
