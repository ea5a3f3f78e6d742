"""Where trials run; an engine knows trials, not what is inside one."""
