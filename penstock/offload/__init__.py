"""Where bytes are: files, layouts, ledgers, tiers, schedules, and the stream through them."""
