"""Where bytes are: files, layouts, ledgers, tiers, schedules and the stream that runs through them."""
