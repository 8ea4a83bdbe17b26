"""What looks at runs and machines from outside: reports, plans, the demo, exports, campaigns."""
