"""Reading, plotting and logging what a run writes."""
