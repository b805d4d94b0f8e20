"""The coloured method: `method` applies it, `colors` finds the colours, `held` and `statistics` hold what normalizations share."""
