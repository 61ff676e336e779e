"""Where the hours of each run went: phases as they arrive, sums over released steps, and the bars made of them."""
