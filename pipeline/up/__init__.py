"""`headrace up`: a broker and all roles on this machine, kept alive, and what a person sees of them."""
