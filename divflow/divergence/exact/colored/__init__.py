"""The coloured method: `method` says when it serves, `colors` finds them, `held` and `statistics` hold what normalizations share."""
