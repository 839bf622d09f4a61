"""A1111 runs this at each start. Nothing is installed into its environment: the tab makes one of its own at its first use."""
