"""Will training work here, and how: the choices for this machine with their reasons, and a try of it all."""
