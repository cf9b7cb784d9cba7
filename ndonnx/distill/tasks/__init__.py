"""What an output means, and so which loss and which measure are right for it: one kind of task a file in `kinds/`."""
