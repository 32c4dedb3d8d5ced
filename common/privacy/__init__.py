"""Noise, mechanisms, plans and accounting: what a study costs a patient, and how it is paid."""
