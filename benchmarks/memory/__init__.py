"""What conversions take of memory and disk, beside what is predicted."""
