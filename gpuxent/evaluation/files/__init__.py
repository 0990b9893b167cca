"""Files of every format: written, converted, sampled and inspected; `sources` reads them."""
