"""Other engines, each a program that runs in a process of its own. They are no dependency of the project."""
