"""What happens to files, memory and results when processes are killed, threads mix, and time goes by."""
