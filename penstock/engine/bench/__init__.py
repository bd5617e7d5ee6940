"""`penstock bench`: what a profile does on this machine, measured and compared."""
