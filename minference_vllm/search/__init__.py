# SPDX-License-Identifier: Apache-2.0
"""Which heads of a model deserve more keys than others: measured on the user's texts, written as a pattern file.

Output errors and times of all candidates come from the same queries and keys, in one reading of a prompt. What an error
of a layer does to the next tokens is measured layer by layer. What is left is to spend the default's time best.
"""
