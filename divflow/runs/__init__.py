"""A run, from its config to what it leaves: settings, training, folder, logs and tables."""
