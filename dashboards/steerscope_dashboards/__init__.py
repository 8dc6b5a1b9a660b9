"""Dashboards, rules and alerts, made from the instruments that the exporter declares.

``settings`` what an operator decides · ``promql`` expressions · ``recording``, ``alerting`` and
``alerts`` the rules · ``panels`` and one module per dashboard · ``writing`` the files · ``answers``
whether a Prometheus answers all of it · ``previews`` pictures of what it answered.
"""
