"""Networks and converters of published weights, one family a file."""
