"""Questions about models that take running them: where two differ, and which layer costs quality."""
