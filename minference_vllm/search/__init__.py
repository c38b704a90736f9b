# SPDX-License-Identifier: Apache-2.0
"""Which heads of a model deserve more keys than others: measured on the user's texts, written as a pattern file.

One reading of a prompt gives the output errors and times of all candidates, from the same queries and keys. What a
layer's error does to the next tokens is measured layer by layer. The choice then spends the default method's time where
it helps most.
"""
