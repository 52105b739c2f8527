"""Training of the built-in language model ``builtin:quill``, from source packages to published weights."""
