#!/bin/sh
# Installs Millwright's agent on boards without dpkg: Yocto, Buildroot, anything with BusyBox. Run it again to upgrade.
#
#   ./install.sh [--prefix DIR] [--root DIR]                the program below /usr; for an image, below its root
#   ./install.sh --uninstall [--purge] [--root DIR]         keeps configuration and state, without --purge
#
# Never overwrites a configuration; starts nothing that has none. With --root nothing is started, and no user is made
# where an image's build does that: it says so.
set -eu
umask 022

user=millwright
prefix=/usr root="" uninstall=no purge=no

fail() {
    echo "install.sh: $*" >&2
    exit 1
}

while [ $# -gt 0 ]; do
    case $1 in
    --prefix | --root)
        [ $# -ge 2 ] || fail "$1 wants a folder"
        case $2 in
        /*) ;;
        *) fail "$1 wants a path from the root on, not $2" ;;
        esac
        case $2 in
        *[!A-Za-z0-9/._-]*) fail "$1 $2: letters, digits and /._- only" ;;
        esac
        if [ "$1" = --prefix ]; then prefix=${2%/}; else root=${2%/}; fi
        shift
        ;;
    --uninstall) uninstall=yes ;;
    --purge) purge=yes ;;
    -h | --help)
        sed -n '2,8s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    *) fail "unknown argument $1; --help says what there is" ;;
    esac
    shift
done
[ $purge = no ] || [ $uninstall = yes ] || fail "--purge goes with --uninstall"
[ -z "$root" ] || [ -d "$root" ] || fail "there is no folder $root"
[ -n "$root" ] || [ "$(id -u)" = 0 ] || fail "this needs root"

# What was installed, one path a line, folders that were made for it with a slash behind: what an uninstallation removes,
# and an upgrade where the new version lacks it.
list=/var/lib/millwright.installed

# Paths below the root, whatever it is.
has() { [ -e "$root$1" ]; }
systemd() { has /lib/systemd/systemd || has /usr/lib/systemd/systemd; }
live() { [ -z "$root" ]; }
managed() { live && [ -d /run/systemd/system ]; }
number() { # passwd|group: the number of the user or group, if there is one
    sed -n "s/^$user:[^:]*:\([0-9]*\):.*/\1/p" "$root/etc/$1" 2> /dev/null || true
}

# inside PATH: fails where a link in an image leads out of it, to this machine's own files.
inside() {
    live && return
    path=$1
    while ! [ -e "$root$path" ] && ! [ -L "$root$path" ]; do path=$(dirname "$path"); done
    case $(readlink -f "$root$path")/ in
    "$(readlink -f "$root")"/*) ;;
    *) fail "$root$path leads out of $root, to $(readlink -f "$root$path"): make its links relative ones" ;;
    esac
}

stop() {
    if managed; then
        systemctl stop millwright.service 2> /dev/null || true
    elif live && [ -x /etc/init.d/millwright ]; then
        /etc/init.d/millwright stop
    fi
}

# ---- installing

check() {
    cd "$(dirname "$0")"
    [ -f SHA256SUMS ] || fail "run it in the folder that the archive was unpacked to"
    sha256sum -c SHA256SUMS > /dev/null || fail "the files are not what SHA256SUMS says; unpack the archive again"
    # A program for another processor says so here, and nothing is changed.
    if live; then
        files/usr/bin/millwright --version > /dev/null ||
            fail "files/usr/bin/millwright does not run here; is the archive for this processor?"
    fi
    # The two would own the same user, unit and program.
    ! has /var/lib/dpkg/info/millwright.list ||
        fail "dpkg has the package millwright at ${root:-/}, or what it left: upgrade by the next package. To change over, copy" \
            "/etc/millwright and /var/lib/millwright away, purge the package, which deletes both, and install again"
    for path in /etc/init.d /etc/rc2.d /etc/rc5.d /etc/systemd/system/multi-user.target.wants /etc/sysusers.d \
        /etc/tmpfiles.d /lib/systemd /usr/lib/systemd /etc/millwright /var/lib/millwright /etc/passwd; do
        inside "$path"
    done
    for path in $(cd files/usr && find . -type d); do inside "$prefix/$path"; done
}

make_folder() {
    [ ! -d "$root$1" ] || return 0
    make_folder "$(dirname "$1")"
    mkdir "$root$1"
    echo "$1/" >> "$root$list.new"
}

# A new file in the place of the old: a running agent keeps its own.
put() { # FILE PATH MODE
    make_folder "$(dirname "$2")"
    cp "$1" "$root$2.new"
    chmod "$3" "$root$2.new"
    mv -f "$root$2.new" "$root$2"
    echo "$2" >> "$root$list.new"
}

link() { # TARGET PATH
    echo "$2" >> "$root$list.new"
    # Who took it away since the last time doesn't want the service started.
    if ! [ -L "$root$2" ] && grep -qsxF "$2" "$root$list"; then return; fi
    make_folder "$(dirname "$2")"
    ln -sf "$1" "$root$2"
}

put_files() {
    put files/usr/bin/millwright "$prefix/bin/millwright" 0755
    for file in $(cd files/usr && find share -type f); do
        put "files/usr/$file" "$prefix/$file" 0644
    done
}

# At every start of the machine from now on.
put_service() {
    service=$(mktemp)
    if systemd; then
        # The administrator's folders: systemd looks there, whatever the prefix.
        sed "s|/usr/bin/millwright|$prefix/bin/millwright|" files/usr/lib/systemd/system/millwright.service > "$service"
        put "$service" /etc/systemd/system/millwright.service 0644
        # An image's first start makes the user and the directories by these.
        put files/usr/lib/sysusers.d/millwright.conf /etc/sysusers.d/millwright.conf 0644
        put files/usr/lib/tmpfiles.d/millwright.conf /etc/tmpfiles.d/millwright.conf 0644
        link ../millwright.service /etc/systemd/system/multi-user.target.wants/millwright.service
    else
        sed "s|@PREFIX@|$prefix|" millwright.init > "$service"
        put "$service" /etc/init.d/millwright 0755
        if has /etc/rc2.d || has /etc/rc5.d; then
            for level in 2 3 4 5; do link ../init.d/millwright "/etc/rc$level.d/S90millwright"; done
            for level in 0 6; do link ../init.d/millwright "/etc/rc$level.d/K10millwright"; done
        else
            # BusyBox as Buildroot sets it up: rcS starts what is called so, rcK stops it.
            link millwright /etc/init.d/S90millwright
        fi
    fi
    rm -f "$service"
}

# The new list in the place of the old, of which goes what the new version lacks.
settle() {
    if [ -f "$root$list" ]; then
        while read -r path; do
            grep -qxF "$path" "$root$list.new" || rm -f "$root$path"
        done < "$root$list"
    fi
    mv "$root$list.new" "$root$list"
}

# By the board's own tool, else as that would write it: BusyBox is built without its own at times.
make_user() {
    if [ -n "$(number passwd)" ] && [ -n "$(number group)" ]; then
        return
    elif ! live; then
        echo "install.sh: the image needs a system user and group $user, home /var/lib/millwright, no login;" \
            "with systemd its first start makes them, else your build must"
    elif command -v useradd > /dev/null; then
        useradd --system --user-group --home-dir /var/lib/millwright --no-create-home --shell /bin/false $user
    else
        id=999
        while grep -q "^[^:]*:[^:]*:$id:" /etc/passwd /etc/group; do
            id=$((id - 1))
            [ $id -gt 100 ] || fail "no number from 101 to 999 is free for the user $user"
        done
        [ -n "$(number group)" ] || echo "$user:x:$id:" >> /etc/group
        echo "$user:x:$id:$(number group):Millwright agent:/var/lib/millwright:/bin/false" >> /etc/passwd
        if [ -f /etc/shadow ]; then echo "$user:!:19000:0:99999:7:::" >> /etc/shadow; fi
    fi
}

# As the package's (deploy/systemd/millwright.tmpfiles). Without a user yet they are root's until the first start.
make_directories() {
    mkdir -p "$root/etc/millwright/tls" "$root/etc/millwright/credentials" "$root/var/lib/millwright"
    chmod 0750 "$root/etc/millwright" "$root/etc/millwright/tls" "$root/var/lib/millwright"
    chmod 0700 "$root/etc/millwright/credentials"
    uid=$(number passwd) gid=$(number group)
    # An image is built as somebody else than root at times.
    if [ -n "$uid" ] && [ -n "$gid" ] && [ "$(id -u)" = 0 ]; then
        chown "0:$gid" "$root/etc/millwright" "$root/etc/millwright/tls"
        chown "$uid:$gid" "$root/var/lib/millwright"
    fi
}

# Now, if there is a configuration: without one the unit and the script start nothing. An upgrade leaves one alone that is
# disabled or was stopped.
start() {
    if managed; then
        systemctl daemon-reload
        if [ $first = no ]; then
            systemctl try-restart millwright.service
        elif systemctl --quiet is-enabled millwright.service; then
            systemctl restart millwright.service
        fi
    elif live && ! systemd; then
        if [ $first = yes ] || /etc/init.d/millwright status > /dev/null; then /etc/init.d/millwright restart; fi
    fi
}

install() {
    check
    make_user
    make_directories
    first=yes
    : > "$root$list.new"
    if [ -f "$root$list" ]; then
        first=no
        # Folders that an earlier version made are still ours.
        grep '/$' "$root$list" > "$root$list.new" || true
    fi
    put_files
    put_service
    settle
    start
    echo "installed: $("$root$prefix/bin/millwright" --version 2> /dev/null || echo millwright), below $root$prefix"
    has /etc/millwright/agent.toml ||
        echo "not configured, so not started; \`millwright init\` configures it"
}

# ---- removing

remove() {
    [ -f "$root$list" ] || fail "nothing that this script installed is at ${root:-/}"
    for path in $(cat "$root$list") /etc/millwright /var/lib/millwright /etc/passwd; do inside "$(dirname "$path")"; done
    stop
    while read -r path; do
        case $path in
        */) ;;
        *) rm -f "$root$path" ;;
        esac
    done < "$root$list"
    # The innermost first; those in which others have put something since stay.
    grep '/$' "$root$list" | sort -r | while read -r path; do
        rmdir "$root$path" 2> /dev/null || true
    done
    rm -f "$root$list"
    ! managed || systemctl daemon-reload
    if [ $purge = yes ]; then
        rm -rf "$root/etc/millwright" "$root/var/lib/millwright"
        remove_user
        echo "removed, with configuration and state"
    else
        echo "removed; configuration and state are kept in /etc/millwright and /var/lib/millwright"
    fi
}

# The user owned what was removed, and nothing else.
remove_user() {
    [ -n "$(number passwd)$(number group)" ] || return 0
    if live && command -v userdel > /dev/null; then
        userdel $user
        [ -z "$(number group)" ] || groupdel $user
    else
        for file in passwd group shadow; do
            [ ! -f "$root/etc/$file" ] || sed -i "/^$user:/d" "$root/etc/$file"
        done
    fi
}

if [ $uninstall = yes ]; then remove; else install; fi
