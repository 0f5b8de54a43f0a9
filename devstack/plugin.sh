#!/bin/bash
#
# devstack/plugin.sh
# vchan-host on devstack's compute hosts

# Dependencies:
#
# - ``functions`` file
# - ``DEST``, ``DATA_DIR``, ``STACK_USER``, ``LIBVIRT_GROUP`` must be defined

# Save trace setting
_XTRACE_VCHAN=$(set +o | grep xtrace)
set +o xtrace

# Functions
# ---------

# QEMU's groups, which the sockets of VMs' channels belong to: Debian's and Ubuntu's, or Fedora's and CentOS's.
function vchan_qemu_groups {
    local group
    for group in libvirt-qemu qemu kvm; do
        if getent group $group >/dev/null; then
            echo $group
        fi
    done
}

function install_vchan {
    # libvirt's module is the distribution's, as nova's is.
    setup_develop $VCHAN_DIR host
}

function configure_vchan {
    local group

    sudo install -d -o $STACK_USER $VCHAN_CONF_DIR $VCHAN_CONF_DIR/policy.d $VCHAN_STATE_DIR
    install -m 644 $VCHAN_DIR/etc/policy.d/90-default.policy $VCHAN_CONF_DIR/policy.d/

    rm -f $VCHAN_CONF
    # It holds the broker's password.
    install -m 640 /dev/null $VCHAN_CONF
    # iniset would take a * for this directory's files.
    cat <<EOF >$VCHAN_CONF
[DEFAULT]

[vchan]
select = $VCHAN_SELECT
listen_topics = $VCHAN_LISTEN_TOPICS
policy_dir = $VCHAN_CONF_DIR/policy.d
socket = $VCHAN_STATE_DIR/host.sock
# The journal.
audit_log = -
EOF
    iniset_rpc_backend vchan $VCHAN_CONF

    for group in $LIBVIRT_GROUP $(vchan_qemu_groups); do
        add_user_to_group $STACK_USER $group
    done
}

function start_vchan {
    run_process vchan-host "$(get_python_exec_prefix)/vchan-host --config-file $VCHAN_CONF"
}

# Images that are there now: on the host that has glance.
function set_vchan_image_property {
    local image
    for image in $(openstack --os-cloud devstack-admin image list -f value -c ID); do
        openstack --os-cloud devstack-admin image set --property hw_qemu_guest_agent=yes $image
    done
}

function cleanup_vchan {
    sudo rm -rf $VCHAN_CONF_DIR $VCHAN_STATE_DIR
}

# Phases
# ------

if is_service_enabled vchan-host; then
    if [[ "$1" == "stack" && "$2" == "install" ]]; then
        if is_service_enabled n-cpu; then
            echo_summary "Installing vchan"
            install_vchan
        fi
    elif [[ "$1" == "stack" && "$2" == "post-config" ]]; then
        if is_service_enabled n-cpu; then
            echo_summary "Configuring vchan"
            configure_vchan
        fi
    elif [[ "$1" == "stack" && "$2" == "extra" ]]; then
        if is_service_enabled n-cpu; then
            echo_summary "Starting vchan-host"
            start_vchan
        fi
        if is_service_enabled g-api && [[ "$VCHAN_SET_IMAGE_PROPERTY" == "True" ]]; then
            set_vchan_image_property
        fi
    fi

    if [[ "$1" == "unstack" ]]; then
        stop_process vchan-host
    fi

    if [[ "$1" == "clean" ]]; then
        cleanup_vchan
    fi
fi

# Restore xtrace
$_XTRACE_VCHAN
