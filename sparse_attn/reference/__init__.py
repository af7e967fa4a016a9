"""The ops in plain torch: slow, right on any device and for any dtype, and the tests' measure."""
