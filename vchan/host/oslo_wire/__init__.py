"""oslo.messaging's wire form, read and written without oslo.messaging. Pure; no byte is trusted.

`downward_envelope` is the way down (services' requests, replies to them), `upward_envelope` the way
up (guests' requests), `mail` what comes in a VM's own queue, `envelope` what all of them share,
`compression` what services compress.
"""
