"""What the folder of a run says, for those who look at it."""
