"""The policy: what a guest may ask for, as whom, how much of it; and the record of each decision.

rule_files     which files are read, and which are refused
rule_parser    the rules' language: texts in, a policy out
rules          the rules, evaluated for one request
lint           what is suspicious in rules that parse
vm_limits      the limits of one VM; `token_bucket` is how a rate is kept to
guest_context  who a guest is to the control side
audit_record   one line of the audit log; `audit_log` is its file
log_budget     how much of the daemon's log one VM may cause

`vchan.host.enforcer` applies all of it to the VMs of this host.
"""
