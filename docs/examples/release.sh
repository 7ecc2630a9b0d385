#!/bin/sh
# Brings the version that stands by live: gates, flip, bake, with one command, and ends
# with its exit code: 0 it has baked, 6 a gate failed, 7 a human is needed, 8 the colour
# cannot be reached, 9 nobody approved it in time, 10 it rolled back by itself; `bgswitch
# help` has them all. Where an approval is required, it waits for that, too.
#
#   release.sh SERVICE [VERSION]
#
# BGSWITCH          the command [bgswitch]; also with options, like "bgswitch --config F"
# BGSWITCH_SOCKET   the daemon's socket [/run/bgswitch/bgswitch.sock]
# WHY               for the journal [pipeline]
#
# Needs curl and jq, and a user who may open the socket: root, or the group bgswitch.
set -u

service=${1:?"usage: release.sh SERVICE [VERSION]"}
version=${2-}
socket=${BGSWITCH_SOCKET:-/run/bgswitch/bgswitch.sock}
bgswitch=${BGSWITCH:-bgswitch}
why=${WHY:-pipeline}

say() { printf '%s\n' "release.sh: $*" >&2; }

api() { # METHOD PATH [CURL'S OPTIONS]: the status, then the body
    method=$1 path=$2
    shift 2
    curl --silent --show-error --unix-socket "$socket" --request "$method" \
        --write-out '%{stderr}%{http_code}\n' "$@" "http://localhost/v1/services/$service$path"
}

# Which generation this pipeline has seen: whoever flips meanwhile is noticed below.
before=$(api GET "" 2>/dev/null) || { say "the daemon does not answer on $socket"; exit 3; }
generation=$(printf '%s' "$before" | jq --raw-output '.generation // empty')
if [ -z "$generation" ]; then
    say "$(printf '%s' "$before" | jq --raw-output .error)"
    exit 2
fi
say "$service is at generation $generation, $(printf '%s' "$before" | jq --raw-output .active) is active"

# A flip, asked for without being carried out, tells whether anything is in the way. With
# If-Match it is 412 for who is not at this generation any more.
code=$(api POST /flip --header "If-Match: \"$generation\"" --data '{"dry_run": true}' \
    2>&1 >/dev/null)
case $code in
    200) ;;
    412) say "somebody flipped $service meanwhile: nothing was done"; exit 5 ;;
    *) say "a flip of $service would be refused ($code)" ;;
esac

# One command, until it is known how it went. The story goes to the log, the result to a file.
result=$(mktemp) || exit 1
trap 'rm -f "$result"' EXIT
# shellcheck disable=SC2086 # the command may have options
$bgswitch -o json release start "$service" ${version:+--version "$version"} --wait \
    --if-generation "$generation" --message "$why" >"$result"
code=$?
if [ -s "$result" ]; then
    jq --raw-output '.release.notes[] | "\(.time)  \(.state)  \(.text)"' "$result" >&2
    jq --raw-output '.release | "\(.id) \(.code) \(.why)"' "$result"
fi

case $code in
    0) say "$service is live on $(jq --raw-output .active "$result")" ;;
    5) say "another release runs, or somebody flipped, or changed what was tested" ;;
    6) say "a gate failed, or a hook: the old version serves on, nothing was flipped" ;;
    7) say "a human is needed: bgswitch release status $service" ;;
    8) say "the colour cannot be reached, or is not known to be healthy: nothing was flipped" ;;
    9) say "nobody approved it, or decided, in time: nothing was flipped" ;;
    10) say "it rolled back by itself: the old version serves" ;;
    *) say "exit code $code: bgswitch release status $service" ;;
esac
exit "$code"
