"""Notices: inform people about runs by a webhook, where there is no alerting stack."""
