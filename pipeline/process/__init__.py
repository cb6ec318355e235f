"""What every process of headrace has: a lifecycle and, if it is a role, a connection with its peers."""
