#!/usr/bin/env bash
# Builds both images of the Dockerfile with buildah, without a container engine
# and without an image registry, and runs what is in them: as their own user, on
# a read-only root file system, with their own environment and nothing else.
# Checks docker-compose.yml too. For Debian, as root; it installs what it needs.
#
# GOPROXY, GOSUMDB and GONOSUMDB are passed on if they are set.
# IMAGE_CHECK_MODCACHE=1 lends the build this machine's module cache, to save time.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "$(id -u)" != 0 ] || [ ! -e /etc/debian_version ]; then
	echo "image-check: Debian and root are needed" >&2
	exit 1
fi

say() { printf '\n== %s\n' "$*"; }
fail() { echo "image-check: FAILED: $*" >&2; exit 1; }
# expect TEXT ... reads what a command said, shows it, and wants each text in it.
expect() {
	local said text
	said=$(cat)
	printf '%s\n' "$said"
	for text; do
		grep -qF -- "$text" <<<"$said" || fail "this does not say: $text"
	done
}

say "install what is missing"
missing=()
for tool in buildah debootstrap docker-compose ip:iproute2 curl; do
	command -v "${tool%%:*}" >/dev/null || missing+=("${tool##*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/image-check.XXXXXX")
net=image-check-$$
running=()
cleanup() {
	for pid in "${running[@]}"; do kill -9 "$pid" 2>/dev/null || :; done
	ip netns delete "$net" 2>/dev/null || :
	if [ -d "$work/storage" ]; then
		b rm --all >/dev/null 2>&1 || :
		umount -q "$work"/storage/overlay/*/merged "$work/storage/overlay" 2>/dev/null || :
	fi
	# Never through a mount that is still there.
	rm -rf --one-file-system "$work" || echo "image-check: $work is left over"
}
trap cleanup EXIT

say "docker-compose.yml"
docker-compose config -q
docker-compose --profile real config -q
echo "valid, with and without the profile: $(docker-compose version --short)"

# Storage of our own, so that nothing of this machine's is used or changed.
driver=overlay
b() { buildah --root "$work/storage" --runroot "$work/run" --storage-driver "$driver" "$@"; }
mkdir -p "$work/storage" "$work/run"
if ! probe=$(b from scratch 2>"$work/log") || ! b mount "$probe" >/dev/null 2>>"$work/log"; then
	echo "overlay storage does not work here, so vfs: $(tail -n 1 "$work/log")"
	b rm --all >/dev/null 2>&1 || :
	driver=vfs
	probe=$(b from scratch)
fi
b rm "$probe" >/dev/null

bases=$(awk 'toupper($1) == "FROM" && $2 != "scratch" { print $2 }' Dockerfile | sort -u)
[[ $bases =~ ^golang:([0-9.]+)-([a-z]+)$ ]] || fail "there is a stand-in for golang:VERSION-SUITE alone, and the Dockerfile names: $bases"
version=${BASH_REMATCH[1]} suite=${BASH_REMATCH[2]} goroot=$(go env GOROOT)
[[ $(go env GOVERSION). == go$version.* ]] || fail "the Dockerfile wants Go $version, and $(go env GOVERSION) is installed here"

say "a local $bases, of Debian $suite and this machine's $(go env GOVERSION)"
c=$(b from scratch)
rootfs=$(b mount "$c")
debootstrap --variant=minbase --include=ca-certificates "$suite" "$rootfs" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >"$work/log" 2>&1 ||
	{ tail "$work/log"; fail "debootstrap"; }
rm -rf "$rootfs"/var/cache/apt/archives/*.deb "$rootfs"/var/lib/apt/lists/*
certificates=$(sha256sum <"$rootfs/etc/ssl/certs/ca-certificates.crt")
mkdir "$rootfs/usr/local/go"
tar -C "$goroot" --exclude=./test -cf - . | tar -C "$rootfs/usr/local/go" --no-same-owner -xf -
b config --env GOPATH=/go --env GOTOOLCHAIN=local --env PATH=/go/bin:/usr/local/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
	--workingdir /go "$c"
b umount "$c" >/dev/null
b commit --quiet --rm "$c" "docker.io/library/$bases" >/dev/null
b images

release=v0.0.0-image-check
options=(--isolation chroot --pull-never --format docker --layers --build-arg "RELEASE=$release"
	--volume /etc/ssl/certs:/etc/ssl/certs:ro)
for name in GOPROXY GOSUMDB GONOSUMDB; do
	[ -z "${!name:-}" ] || options+=(--build-arg "$name=${!name}")
done
if [ -n "${IMAGE_CHECK_MODCACHE:-}" ]; then
	options+=(--volume "$(go env GOMODCACHE):/go/pkg/mod")
fi
for target in tenantry clarifaisim build; do
	say "build $target"
	which=(--target "$target")
	[ "$target" != tenantry ] || which=() # it must be the default
	b build "${options[@]}" "${which[@]}" --tag "$target:check" . >"$work/log" 2>&1 ||
		{ tail -n 30 "$work/log"; fail "build $target"; }
	grep -E '^(\[|COMMIT|--> Using cache)' "$work/log"
done

# image TARGET FIELD prints a field of an image's configuration.
image() { b inspect --type image --format "{{$2}}" "$1:check"; }

ip netns add "$net"
ip -n "$net" link set lo up
declare -A roots
for target in tenantry clarifaisim; do
	say "what is in $target"
	roots[$target]=$(b mount "$(b from --pull-never "$target:check")")
	(cd "${roots[$target]}" && find . -mindepth 1 \( -type f -printf '%M %U:%G %10s  %P\n' -o -empty -printf '%M %U:%G %10s  %P\n' \))
	[ -z "$(find "${roots[$target]}" -perm /6000)" ] || fail "a file with the set-user-id bit"
	user=$(image "$target" .OCIv1.Config.User)
	[[ $user =~ ^[1-9][0-9]*:[1-9][0-9]*$ ]] || fail "the user $user is no number, or root"
	echo "user $user, environment $(image "$target" .OCIv1.Config.Env), entry point $(image "$target" .OCIv1.Config.Entrypoint), labels $(image "$target" .OCIv1.Config.Labels)"
	install -d -m 0700 -o "${user%:*}" -g "${user#*:}" "$work/data-$target"
done
image tenantry .Docker.Config.Healthcheck | expect "/usr/local/bin/tenantry healthcheck"
[ "$certificates" = "$(sha256sum <"${roots[tenantry]}/etc/ssl/certs/ca-certificates.crt")" ] || fail "the CA certificates are not those of the base image"

# in_image TARGET [NAME=VALUE...] -- ARGUMENT... becomes the program of an image,
# as docker run --read-only would run it, with a volume at its data folder.
in_image() {
	local target=$1 user entry vars
	shift
	mapfile -t vars < <(image "$target" 'range .OCIv1.Config.Env}}{{println .}}{{end' | grep .)
	while [ "$1" != -- ]; do vars+=("$1"); shift; done
	shift
	user=$(image "$target" .OCIv1.Config.User)
	entry=$(image "$target" 'index .OCIv1.Config.Entrypoint 0')
	# shellcheck disable=SC2016 # it is for the inner shell
	exec ip netns exec "$net" unshare --mount --propagation private bash -euc '
		root=$1 data=$2 folder=$3 user=$4 n=$5; shift 5
		mount --bind "$root" "$root"
		mount -o remount,bind,ro "$root"
		mount --bind "$data" "$root$folder"
		cd /
		exec env -i "${@:1:n}" /usr/bin/setpriv --no-new-privs /usr/sbin/chroot --userspec="$user" --groups= "$root" "${@:n+1}"
	' in_image "${roots[$target]}" "$work/data-$target" "/var/lib/$target" "$user" "${#vars[@]}" "${vars[@]}" "$entry" "$@"
}

# exits CODE COMMAND... runs a command and wants it to end with this code.
exits() {
	local want=$1 got=0
	shift
	(in_image "$@") 2>&1 || got=$?
	[ "$got" = "$want" ] || fail "$* exits with $got and not $want"
}

# started NAME COMMAND... runs a command in the background; $! is its process.
started() {
	local log=$work/$1.log
	shift
	(in_image "$@") >"$log" 2>&1 &
	running+=($!)
}

get() { ip netns exec "$net" curl -sS --max-time 5 "$@"; }

# until_true COMMAND... waits for a command to succeed.
until_true() {
	local i
	for ((i = 0; i < 150; i++)); do
		"$@" >/dev/null 2>&1 && return
		sleep 0.1
	done
	tail "$work"/*.log
	fail "waited 15 seconds for: $*"
}

# stopped NAME PID ends a process as a container engine does.
stopped() {
	local code=0
	kill -TERM "$2"
	wait "$2" || code=$?
	tail -n 2 "$work/$1.log"
	[ "$code" = 0 ] || { cat "$work/$1.log"; fail "$1 exits with $code on SIGTERM"; }
}

# compose EXPRESSION prints a part of docker-compose.yml.
compose() { docker-compose config | python3 -c 'import sys, yaml; services = yaml.safe_load(sys.stdin)["services"]; print('"$1"')'; }
# compose_env SERVICE prints a service's environment, with all hosts being this one.
compose_env() {
	compose '*(f"{k}={v}" for k, v in services["'"$1"'"]["environment"].items()), sep="\n"' |
		sed -E 's#//clarifaisim:#//127.0.0.1:#; s#@postgres:#@127.0.0.1:#'
}
mapfile -t settings < <(compose_env tenantry)
mapfile -t settings_migrate < <(compose_env migrate)
mapfile -t settings_sim < <(compose_env clarifaisim)

say "tenantry version"
exits 0 tenantry -- version | expect "$release"
say "tenantry serve without settings names all its faults"
exits 1 tenantry -- serve | expect DATABASE_URL TENANTRY_KEYSET_FILE CLARIFAI_PAT
say "tenantry healthcheck where nothing runs"
exits 1 tenantry -- healthcheck | expect "connection refused"
say "the keyset service of docker-compose.yml makes a keyset and keeps it"
builder=$(b from --pull-never build:check)
script=$(compose 'services["keyset"]["entrypoint"][-1].replace("$$", "$")')
for try in made kept; do
	b run --isolation chroot --user "$(compose 'services["keyset"]["user"]')" --env "$(compose_env keyset)" \
		--volume "$work/data-tenantry:/var/lib/tenantry" "$builder" -- /bin/sh -c "$script"
	sum=$(sha256sum "$work/data-tenantry/keyset.json")
	[ "$try" = made ] || [ "$sum" = "$before" ] || fail "the keyset is another one"
	before=$sum
done
stat -c '%A %u:%g' "$work/data-tenantry/keyset.json" | expect "-rw------- 65532:65532"
say "tenantry keyset create: in the volume, once, and nowhere else"
exits 0 tenantry -- keyset create --keyset-file=/var/lib/tenantry/other.json | expect "made /var/lib/tenantry/other.json"
exits 1 tenantry "${settings[@]}" -- keyset create | expect "is there already"
exits 1 tenantry -- keyset create --keyset-file=/keyset.json | expect "read-only file system"

say "tenantry serve, its database away"
started waiting tenantry "${settings[@]}" -- serve
pid=$!
until_true get --fail http://127.0.0.1:8081/livez
exits 0 tenantry -- healthcheck
get -w ' %{http_code}\n' http://127.0.0.1:8081/readyz | expect '"ready":false' 503
grep -E '^(Uid|Gid|Groups|CapEff|NoNewPrivs|VmRSS)' "/proc/$pid/status"
grep -qE '^CapEff:\s+0+$' "/proc/$pid/status" || fail "it has capabilities"
stopped waiting "$pid"

say "clarifaisim"
started clarifaisim clarifaisim "${settings_sim[@]}" --
simulator=$!
until_true get --fail http://127.0.0.1:8090/_sim/state
get http://127.0.0.1:8090/_sim/state | expect '"apps":0'

postgres=$(find /usr/lib/postgresql -name initdb -printf '%h\n' 2>/dev/null | sort -V | tail -n 1)
if [ -n "$postgres" ]; then
	say "a sign-up through both images with the settings of docker-compose.yml, on a Postgres of this machine: $postgres"
	chmod 711 "$work"
	install -d -m 0700 -o nobody -g nogroup "$work/postgres"
	as_nobody=(ip netns exec "$net" setpriv --reuid=nobody --regid=nogroup --clear-groups)
	(cd / && "${as_nobody[@]}" "$postgres/initdb" -D "$work/postgres" -U tenantry -A trust >"$work/initdb.log")
	(cd / && exec "${as_nobody[@]}" "$postgres/postgres" -D "$work/postgres" -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off) \
		>"$work/postgres.log" 2>&1 &
	database=$!
	running+=("$database")
	psql=(ip netns exec "$net" "$postgres/psql" -q -h 127.0.0.1 -U tenantry)
	until_true "${psql[@]}" -d postgres -c 'CREATE DATABASE tenantry'
	exits 0 tenantry "${settings_migrate[@]}" -- migrate up
	started serve tenantry "${settings[@]}" -- serve
	pid=$!
	until_true get --fail http://127.0.0.1:8081/readyz
	get http://127.0.0.1:8081/readyz
	token=$(in_image tenantry "${settings[@]}" -- token create --name image-check --role provisioner)
	get -X PUT -H "Authorization: Bearer $token" --json '{"display_name":"Ada"}' http://127.0.0.1:8080/v1/tenants/user_1 |
		sed -E 's/("key":"....)[^"]*/\1…/' | expect '"state":"active"'
	exits 0 tenantry -- healthcheck
	grep VmRSS "/proc/$pid/status"
	stopped serve "$pid"
	kill -INT "$database"
	wait "$database"
else
	say "no Postgres on this machine: the sign-up through both images is left out"
fi
stopped clarifaisim "$simulator"

say "both images are good"
b images --format '{{.Name}} {{.Size}}' | grep -E '/(tenantry|clarifaisim) '
