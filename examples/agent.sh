#!/bin/sh
# An agent in any language: here a shell, busybox's will do. Serves topic "shell" over vchan-http.
#
#     vchan-http --listen tcp:127.0.0.1:8779 --token-file /etc/vchan/http.token &
#     sh agent.sh http://127.0.0.1:8779 "$(cat /etc/vchan/http.token)"
#
# or on a laptop
#
#     vchan dev run --http 8779 sh agent.sh
#
# A request is acknowledged before it is run: who does not get that far has not run it, and another
# gets it.

base=${1:-$VCHAN_HTTP}
token=${2:-$VCHAN_HTTP_TOKEN}

ask() { # VERB JSON
    wget -q -O - --header "Authorization: Bearer $token" --post-data "$2" "$base/v1/$1"
}

member() { # of the request; good enough for texts without quotes
    printf '%s\n' "$request" | sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p"
}

while :; do
    if ! request=$(ask receive '{"topics": ["shell"], "max": 1, "wait_s": 20}'); then
        sleep 1 # vchan-http or vchan-guest is away
        continue
    fi
    lease=$(member lease)
    [ -n "$lease" ] || continue # nothing came
    ask ack "{\"lease\": \"$lease\"}" || continue # somebody else's by now
    case $(member method) in
        shout)
            result=$(member text | tr a-z A-Z)
            answer="\"result\": \"$result\""
            ;;
        note)
            member text >>"${NOTES:-/tmp/notes}"
            continue # a cast has no answer
            ;;
        *)
            answer="\"failure\": {\"class\": \"NoSuchMethod\", \"message\": \"only shout and note\"}"
            ;;
    esac
    ask reply "{\"lease\": \"$lease\", $answer}"
done
