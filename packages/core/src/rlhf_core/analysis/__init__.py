"""What is made of many runs: curves over seeds, and how rare bad outputs are against what it costs."""
