"""What the book needs: experiments, their records, the paper's numbers, and the figures and tables drawn from both."""
