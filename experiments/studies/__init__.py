"""The studies, each in a module of its own, which is found here and has a STUDY."""
