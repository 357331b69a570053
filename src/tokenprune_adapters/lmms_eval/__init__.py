"""Evaluation harnesses: models of lmms-eval with compressed visual tokens.

lmms-eval finds them through the entry-point group `lmms_eval.models`. Nothing here is imported
unless lmms-eval is.
"""
