"""The student methods, one a file, which has the method's name: found by it, and imported when first asked for."""
