"""An engine in a supervised child process. The modules here run in the parent; those in `child` run in the child."""
