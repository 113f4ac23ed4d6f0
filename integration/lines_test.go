package integration

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/shoalnet/shoal/internal/imagefile"
	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/lab"
)

// typed says of a line of Docker's what there must be before it, and what is to come of
// it, where that is more than exit status 0.
type typed struct {
	// before are a thing of things each, or a line that is typed first, without 'shoal'. One
	// after a '-' may fail.
	before []string
	first  func(o operator)
	in     string // standard input, else it is at its end
	until  string // it does not end by itself: it is interrupted once it has said this
	tty    bool   // typed at a terminal
	says   string // of its output, on both
	// ask is typed next, and answers with want.
	ask, want string
	after     []string // as before
	left      string   // why it is not typed
}

// things are what lines are about: how to know that one is there, and how it comes.
var things = map[string]struct {
	is   string
	make []string
}{
	"app":       {"net inspect app", []string{"net create app"}},
	"old":       {"net inspect old", []string{"net create old"}},
	"key":       {"secret inspect key", []string{"secret create key ./docker_test.go"}},
	"key1":      {"secret inspect key1", []string{"secret create key1 ./docker_test.go"}},
	"key2":      {"secret inspect key2", []string{"secret create key2 ./docker_test.go"}},
	"conf":      {"config inspect conf", []string{"config create conf ./docker_test.go"}},
	"config c1": {"config inspect c1", []string{"config create c1 ./docker_test.go"}},
	"config c2": {"config inspect c2", []string{"config create c2 ./docker_test.go"}},
	"web":       {"svc inspect web", []string{"app", "svc create -q --name web --network app -p 80:80 --update-monitor 1ms --rollback-monitor 1ms nginx"}},
	"db":        {"svc inspect db", []string{"app", "svc create -q --name db --network app --update-monitor 1ms nginx"}},
	"c1":        {"exec c1 true", []string{"-rm -f c1", "app", "run -d --name c1 --network app -p 8080:80 nginx"}},
	"c2":        {"exec c2 true", []string{"-rm -f c2", "run -d --name c2 nginx"}},
	"image":     {"image inspect nginx", []string{"pull nginx"}},
	"data":      {"volume inspect data", []string{"volume create data"}},
}

// kinds are what lines of one kind need, but for what their own row says.
var kinds = []struct {
	line   string
	before []string
}{
	{`--secret source=key\b`, []string{"key"}},
	{`--config source=conf\b`, []string{"conf"}},
	{`^service (ls|list|ps|inspect|logs|scale|rollback|update|rm|remove)|^inspect --type service`, []string{"web"}},
	{`^service (ps|scale|rm) .*\bdb`, []string{"db"}},
	{`^network create`, []string{"-svc rm web", "-svc rm db", "-net rm app"}},
	{`^network (ls|inspect|rm)`, []string{"app"}},
	{`^(secret|config) create`, []string{"-svc rm web", "-secret rm key", "-config rm conf"}},
	{`^secret (ls|inspect|rm)`, []string{"key"}},
	{`^config (ls|inspect|rm)`, []string{"conf"}},
	{`^run .*--name c1`, []string{"-rm -f c1"}},
	{`--network app`, []string{"app"}},
	{`^(exec|logs|inspect|stop|restart|kill|rm -f|rename|cp|top|attach|port|stats|ps)\b`, []string{"c1"}},
	{` c1 c2$`, []string{"c2"}},
	{`^start `, []string{"c1", "stop c1"}},
	{`^(rmi|image (rm|inspect)|save)`, []string{"image"}},
	{`^volume (ls|inspect|rm)`, []string{"data"}},
}

const manyFiles = `service create --name web --cap-add NET_ADMIN --cap-drop ALL --sysctl net.core.somaxconn=1024 --ulimit nofile=65536:65536 nginx`

// dockerLines are those of cmd/shoal/testdata/docker-lines.txt of which there is more to say than
// that they succeed.
var dockerLines = map[string]typed{
	`service create --name web --replicas 3 -p 80:80 nginx`:                                              {ask: `service ls --format {{.Name}}:{{.Replicas}}:{{.Ports}}`, want: `^web:3/3:\*:80->80/tcp\n$`},
	`service create --name web --replicas=5 --network app --publish published=8080,target=80 nginx:1.27`: {ask: `port web`, want: `^80/tcp -> 0\.0\.0\.0:8080\n$`},
	`service create --name web --publish mode=host,target=80,published=8080 nginx`:                       {ask: `service inspect -f "{{json .Endpoint.Ports}}" web`, want: `"PublishMode":"host","PublishedPort":8080`},
	`service create --name db --constraint node.labels.disk==ssd --mount type=volume,source=data,target=/var/lib/postgresql/data -e POSTGRES_PASSWORD=x postgres:16`: {
		ask: `exec db.1 sh -c "echo $POSTGRES_PASSWORD; grep -c /var/lib/postgresql/data /proc/mounts"`, want: `^x\n1\n$`},
	`service create --mode global --name exporter prom/node-exporter`:                               {ask: `service ls --format "{{.Mode}} {{.Replicas}}"`, want: `^global 3/3\n$`},
	`service create --mode replicated-job --replicas 10 --max-concurrent 2 --name job busybox true`: {ask: `service ls --format {{.Replicas}}`, want: `\(10/10 completed\)`},
	`service create --mode global-job --name patch busybox true`:                                    {ask: `service ls --format {{.Replicas}}`, want: `\(3/3 completed\)`},
	`service create --name redis --limit-cpu .5 --limit-memory 512M --reserve-memory 256M redis`:    {ask: `service inspect -f "{{json .Spec.TaskTemplate.Resources}}" redis`, want: `"MemoryBytes":536870912,"NanoCPUs":500000000.*"MemoryBytes":268435456`},
	`service create --name redis --replicas-max-per-node 1 --replicas 2 redis`:                      {ask: `service ps -q --filter desired-state=running redis`, want: `^\w+\n\w+\n$`},
	`service create --name web --update-delay 10s --update-parallelism 2 --update-failure-action rollback --update-monitor 5s --update-max-failure-ratio 0.2 --update-order start-first nginx`: {
		ask: `service inspect -f "{{json .Spec.UpdateConfig}}" web`, want: `^{"Delay":10000000000,"FailureAction":"rollback","MaxFailureRatio":0\.2,"Monitor":5000000000,"Order":"start-first","Parallelism":2}\n$`},
	`service create --name web --rollback-delay 10s --rollback-parallelism 0 --rollback-order stop-first --rollback-monitor 20s nginx`: {
		ask: `service inspect -f "{{json .Spec.RollbackConfig}}" web`, want: `"Delay":10000000000.*"Monitor":20000000000,"Order":"stop-first","Parallelism":0`},
	`service create --name web --restart-condition on-failure --restart-delay 5s --restart-max-attempts 3 --restart-window 30s nginx`: {
		ask: `service inspect -f "{{json .Spec.TaskTemplate.RestartPolicy}}" web`, want: `^{"Condition":"on-failure","Delay":5000000000,"MaxAttempts":3,"Window":30000000000}\n$`},
	`service create --name web --placement-pref spread=node.labels.zone --replicas 9 nginx`: {ask: `service ls --format {{.Replicas}}`, want: `^9/9\n$`},
	`service create --name web --health-cmd "curl -f http://localhost/" --health-interval 5s --health-retries 3 --health-timeout 2s --health-start-period 10s nginx`: {
		ask: `inspect -f {{.State.Health.Status}} web.1`, want: `^healthy\n$`},
	`service create --name web --no-healthcheck nginx`:                                 {ask: `service inspect -f "{{json .Spec.TaskTemplate.ContainerSpec.Healthcheck.Test}}" web`, want: `^\["NONE"\]\n$`},
	`service create --name shell -t alpine`:                                            {ask: `exec shell.1 ls -l /proc/1/fd/0`, want: `/pts/|/dev/console`},
	`service create --name web --label com.example.team=a --container-label x=y nginx`: {ask: `ps -q --filter label=x=y`, want: `^\w+\n$`},
	`service create --name web --endpoint-mode dnsrr --network app nginx`:              {ask: `run --rm --network app alpine wget -qO- http://web/`, want: `^hello\n$`},
	`service create --name web --secret source=key,target=/run/key,mode=0400 --config source=conf,target=/etc/nginx/nginx.conf nginx`: {
		ask: `exec web.1 cat /run/key /etc/nginx/nginx.conf`, want: `^package main\npackage main\n$`},
	`service create --name web --user 1000:1000 --group video --workdir /srv --hostname {{.Node.Hostname}}-{{.Task.Slot}} nginx`: {
		ask: `exec web.1 sh -c "id; grep Groups /proc/self/status; pwd; cat /etc/hostname"`, want: `^uid=1000 gid=1000.*\nGroups:\s+44 \n/srv\nnode\d-1\n$`},
	manyFiles: {
		ask: `exec web.1 sh -c "grep CapEff /proc/self/status; cat /proc/sys/net/core/somaxconn; ulimit -n"`, want: `^CapEff:\t0+1000\n1024\n65536\n$`},
	`service create --name web --read-only --init --stop-signal SIGQUIT --stop-grace-period 30s nginx`: {ask: `exec web.1 sh -c "echo x > /x"`, want: `Read-only file system`},
	`service create --name web --dns 9.9.9.9 --dns-search example.com --dns-option timeout:1 --host db:192.0.2.7 nginx`: {
		ask: `exec web.1 cat /etc/hosts /etc/resolv.conf`, want: `(?s)192\.0\.2\.7\s+db\n.*search example\.com\n.*timeout:1`},
	// Its program ends well, and is started anew for ever, in Swarm as here.
	`service create --name web --entrypoint /bin/sh nginx -c true`:                         {until: `restart \d in`, ask: `service inspect -f "{{json .Spec.TaskTemplate.ContainerSpec.Command}} {{json .Spec.TaskTemplate.ContainerSpec.Args}}" web`, want: `^\["/bin/sh"\] \["-c","true"\]\n$`},
	`service create --name web --mount type=bind,src=/etc/ssl,dst=/etc/ssl,readonly nginx`: {ask: `exec web.1 sh -c "ls /etc/ssl; echo x > /etc/ssl/x"`, want: `(?s)certs.*Read-only file system`},
	`service create --name web --mount type=tmpfs,destination=/run,tmpfs-size=16m nginx`:   {ask: `exec web.1 grep "tmpfs /run " /proc/mounts`, want: `size=16384k`},
	`service create --name web -d -q --with-registry-auth registry.example.com/team/web:1`: {says: `^\w{12}\n$`, ask: `service inspect -f {{.Spec.TaskTemplate.ContainerSpec.Image}} web`, want: `^registry\.example\.com/team/web:1@sha256:`},
	`service create --name web --log-opt max-size=10m nginx`:                               {ask: `service inspect -f "{{json .Spec.TaskTemplate.LogDriver}}" web`, want: `"max-size":"10485760"`},
	`service ls`:                                  {says: `(?m)^ID .*NAME`},
	`service ls -q`:                               {says: `^\w{12}\n$`},
	`service ls --filter name=web`:                {says: `\bweb\b`},
	`service ls -f mode=replicated`:               {says: `\bweb\b`},
	`service ls --format {{.Name}}:{{.Replicas}}`: {says: `^web:1/1\n$`},
	`service ls --format "table {{.ID}}\t{{.Name}}\t{{.Mode}}\t{{.Image}}\t{{.Ports}}"`: {says: `ID +NAME +MODE +IMAGE +PORTS\n\w+ +web +replicated +nginx:latest +\*:80->80/tcp`},
	`service ls --format json`:     {says: `^{.*}\n$`},
	`service ps web`:               {says: `web\.1.* running`},
	`service ps -q web`:            {says: `^\w{12}\n$`},
	`service ps -f node=node1 web`: {says: `NAME`},
	`service ps --format "{{.Name}} {{.CurrentState}} {{.Node}} {{.Error}}" web`: {says: `^web\.1\S* Running .* ago node\d`},
	`service ps web db`:                           {says: `(?s)web\.1.*db\.1|db\.1.*web\.1`},
	`service inspect web`:                         {says: `(?s)^\[\n.*"name": "web"`},
	`service inspect --pretty web`:                {says: `Service Mode:\s+Replicated`},
	`service inspect --format {{.Spec.Name}} web`: {says: `^web\n$`},
	`service inspect -f "{{range .Endpoint.VirtualIPs}}{{.Addr}} {{end}}" web`:       {says: `^10\.\d+\.\d+\.\d+/\d+ \n$`},
	`service inspect --format "{{json .Spec.TaskTemplate.ContainerSpec.Image}}" web`: {says: `nginx:latest@sha256:`},
	`service inspect --format {{.UpdateStatus.State}} web`:                           {before: []string{"service update -q --env-add N=1 web"}, says: `^completed\n$`},
	`service logs web`:                                           {says: `serving`},
	`service logs -f web`:                                        {until: `serving`},
	`service logs --tail 100 -t web`:                             {says: `T\S+Z.*serving`},
	`service logs --since 10m --no-trunc web`:                    {says: `serving`},
	`service logs --no-task-ids --raw web`:                       {says: `^(serving\n)+$`},
	`service logs --details --no-resolve web`:                    {says: `serving`},
	`service scale web=5`:                                        {ask: `service ls --filter name=web --format {{.Replicas}}`, want: `^5/5\n$`},
	`service scale web=5 db=1`:                                   {says: `(?s)web scaled to 5.*db scaled to 1`},
	`service scale -d web=0`:                                     {ask: `service inspect -f {{.Spec.Mode.Replicated.Replicas}} web`, want: `^0\n$`, after: []string{"service rm web"}},
	`service rollback web`:                                       {before: []string{"service update -q --label-add v=1 web"}, ask: `service inspect -f "{{json .Spec.Labels}}" web`, want: `^(null|{})\n$`},
	`service rollback -d -q web`:                                 {before: []string{"service update -q --label-add v=1 web"}, ask: `service inspect -f "{{json .Spec.Labels}}" web`, want: `^(null|{})\n$`},
	`service rm web`:                                             {says: `^web\n$`, ask: `service inspect web`, want: `no such service`},
	`service rm web db`:                                          {ask: `service ls -q`, want: `^$`},
	`service remove web`:                                         {ask: `service ls -q`, want: `^$`},
	`service update --image nginx:1.28 web`:                      {ask: `service ls --format {{.Image}}`, want: `^nginx:1\.28\n$`},
	`service update --force web`:                                 {ask: `service ps -q web`, want: `^\w+\n\w+\n`},
	`service update --replicas 5 web`:                            {ask: `service ls --filter name=web --format {{.Replicas}}`, want: `^5/5\n$`, after: []string{"service scale -q web=1"}},
	`service update --env-add A=b --env-rm C web`:                {before: []string{"service update -q --env-add C=d web"}, ask: `exec web.1 env`, want: `(?s)^[^C]*A=b\n[^C]*$`},
	`service update --publish-add 8080:80 --publish-rm 80 web`:   {ask: `port web`, want: `^80/tcp -> 0\.0\.0\.0:8080\n$`},
	`service update --publish-add published=8443,target=443 web`: {ask: `port web`, want: `443/tcp -> 0\.0\.0\.0:8443\n`},
	// Nothing of it is there, and Docker says nothing of that.
	`service update --publish-rm 81 --env-rm NONE --label-rm none --container-label-rm none --constraint-rm node.role==none --mount-rm /none --secret-rm none --config-rm none --network-rm old --host-rm none --dns-rm 192.0.2.1 --group-rm none web`: {
		before: []string{"old"}, ask: `service ps -q --filter desired-state=running web`, want: `^\w+\n$`},
	`service update --network-add app --network-rm old web`: {before: []string{"-service rm web", "old", "service create -q --name web --network old --update-monitor 1ms nginx"},
		ask: `run --rm --network app alpine wget -qO- http://web/`, want: `^hello\n$`, after: []string{"service rm web"}},
	`service update --constraint-add node.role==worker --constraint-rm node.role==manager web`: {ask: `service ps --filter desired-state=running --format {{.Node}} web`, want: `^node[23]\n$`},
	`service update --limit-cpu 1 --limit-memory 1G --reserve-cpu .1 web`:                      {ask: `service inspect -f "{{json .Spec.TaskTemplate.Resources}}" web`, want: `"MemoryBytes":1073741824,"NanoCPUs":1000000000`},
	`service update --secret-rm key1 --secret-add source=key2,target=key web`:                  {before: []string{"key1", "key2", "service update -q --secret-add key1 web"}, ask: `exec web.1 ls /run/secrets`, want: `^key\n$`},
	`service update --config-rm c1 --config-add source=c2,target=/etc/c web`:                   {before: []string{"config c1", "config c2", "service update -q --config-add source=c1,target=/etc/c web"}, ask: `exec web.1 cat /etc/c`, want: `^package main\n$`},
	`service update --label-add a=b --label-rm c web`:                                          {ask: `service ls -q --filter label=a=b`, want: `^\w+\n$`},
	`service update --container-label-add a=b --container-label-rm c web`:                      {ask: `ps -q --filter label=a=b`, want: `^\w+\n$`},
	`service update --mount-add type=volume,src=data,dst=/data --mount-rm /old web`:            {before: []string{"service update -q --mount-add type=tmpfs,dst=/old web"}, ask: `exec web.1 sh -c "grep -c /data /proc/mounts; grep -c /old /proc/mounts"`, want: `^1\n0\n`},
	`service update --update-parallelism 1 --update-delay 30s --update-order stop-first web`:   {ask: `service inspect -f {{.Spec.UpdateConfig.Order}} web`, want: `^stop-first\n$`},
	`service update --rollback web`:                                                            {ask: `service inspect -f {{.Spec.UpdateConfig.Order}} web`, want: `^start-first\n$`},
	`service update --rollback-parallelism 2 web`:                                              {ask: `service inspect -f {{.Spec.RollbackConfig.Parallelism}} web`, want: `^2\n$`},
	`service update --restart-condition none web`:                                              {ask: `service inspect -f {{.Spec.TaskTemplate.RestartPolicy.Condition}} web`, want: `^none\n$`},
	`service update --placement-pref-add spread=node.labels.zone --placement-pref-rm spread=node.labels.rack web`: {
		ask: `service inspect -f "{{json .Spec.TaskTemplate.Placement.Preferences}}" web`, want: `node\.labels\.zone`},
	`service update --replicas-max-per-node 2 web`:                               {ask: `service inspect -f {{.Spec.TaskTemplate.Placement.MaxReplicas}} web`, want: `^2\n$`},
	`service update --health-cmd true web`:                                       {ask: `inspect -f {{.State.Health.Status}} web.1`, want: `^healthy\n$`},
	`service update --args "--verbose --port 80" web`:                            {ask: `service inspect -f "{{json .Spec.TaskTemplate.ContainerSpec.Args}}" web`, want: `^\["--verbose","--port","80"\]\n$`},
	`service update --host-add db:192.0.2.7 --host-rm db:192.0.2.8 web`:          {before: []string{"service update -q --host-add db:192.0.2.8 web"}, ask: `exec web.1 cat /etc/hosts`, want: `(?s)^[^8]*192\.0\.2\.7\s+db\n[^8]*$`},
	`service update --dns-add 9.9.9.9 --dns-rm 1.1.1.1 web`:                      {ask: `service inspect -f "{{json .Spec.TaskTemplate.ContainerSpec.DNSConfig.Nameservers}}" web`, want: `^\["9\.9\.9\.9"\]\n$`},
	`service update --user nobody --workdir / web`:                               {ask: `exec web.1 sh -c "id -u; pwd"`, want: `^65534\n/\n$`},
	`service update --with-registry-auth --image registry.example.com/web:2 web`: {ask: `service ls --filter name=web --format {{.Image}}`, want: `^registry\.example\.com/web:2\n$`},
	`service update -d --force web`:                                              {},
	`service update --endpoint-mode dnsrr web`:                                   {before: []string{"-service rm web", "service create -q --name web --network app --update-monitor 1ms nginx"}, ask: `service inspect -f {{.Spec.EndpointSpec.Mode}} web`, want: `^dnsrr\n$`},
	`service update --stop-grace-period 1m --stop-signal INT web`:                {ask: `service inspect -f "{{.Spec.TaskTemplate.ContainerSpec.StopSignal}} {{.Spec.TaskTemplate.ContainerSpec.StopGracePeriod}}" web`, want: `^(SIG)?INT 60000000000\n$`, after: []string{"service rm web"}},

	`node ls`:                              {says: `node1.*ready.*active.*leader`},
	`node ls -q`:                           {says: `^(\w{12}\n){3}$`},
	`node ls --filter role=manager`:        {says: `node1`},
	`node ls --filter node.label=zone=a`:   {says: `node1`},
	`node ls --filter membership=accepted`: {says: `node3`},
	`node ls --format "{{.Hostname}} {{.Status}} {{.Availability}} {{.ManagerStatus}}"`: {says: `(?i)node1 ready active leader`},
	`node inspect --format {{.Status.Addr}} node1`:                                      {says: `^172\.30\.0\.1\n$`},
	`node inspect -f "{{.Spec.Role}} {{.Description.Hostname}}" node1`:                  {says: `^manager node1\n$`},
	`node promote node2`:                                        {ask: `node inspect -f {{.Spec.Role}} node2`, want: `^manager\n$`},
	`node demote node2`:                                         {ask: `node inspect -f {{.Spec.Role}} node2`, want: `^worker\n$`},
	`node update --availability drain node1`:                    {ask: `node inspect -f {{.Spec.Availability}} node1`, want: `^drain\n$`},
	`node update --availability active node1`:                   {ask: `node inspect -f {{.Spec.Availability}} node1`, want: `^active\n$`},
	`node update --label-add zone=a --label-add disk=ssd node1`: {ask: `node inspect -f "{{json .Spec.Labels}}" node1`, want: `^{"disk":"ssd","zone":"a"}\n$`},
	`node update --label-rm zone node1`:                         {ask: `node inspect -f "{{json .Spec.Labels}}" node1`, want: `^{"disk":"ssd"}\n$`},
	`node update --role worker node2`:                           {before: []string{"node promote node2"}, ask: `node inspect -f {{.Spec.Role}} node2`, want: `^worker\n$`},
	`node rm node3`:                                             {first: operator.fell3, ask: `node ls --format {{.Hostname}}`, want: `^node1\nnode2\n$`},
	`node rm --force node3`:                                     {first: operator.join3, ask: `node ls --format {{.Hostname}}`, want: `^node1\nnode2\n$`},

	`network create -d overlay --subnet 10.20.0.0/16 --gateway 10.20.0.1 app`: {ask: `network inspect -f "{{json .IPAM.Config}}" app`, want: `"Gateway":"10\.20\.0\.1",.*"Subnet":"10\.20\.0\.0/16"`},
	`network create --driver overlay --internal --label a=b app`:              {ask: `network inspect -f "{{.Internal}} {{.Labels.a}}" app`, want: `^true b\n$`},
	`network ls -q --filter driver=overlay`:                                   {says: `^(\w{12}\n)+$`},
	`network ls --format "{{.ID}} {{.Name}} {{.Driver}} {{.Scope}}"`:          {says: `\w{12} app overlay swarm\n`},
	`network inspect --format "{{range .IPAM.Config}}{{.Subnet}}{{end}}" app`: {says: `^10\.\d+\.\d+\.\d+/\d+\n$`},
	`network connect app c1`: {before: []string{"-rm -f c1", "app", "run -d --name c1 nginx"}, ask: `inspect -f "{{json .NetworkSettings.Networks}}" c1`, want: `"app":`},
	`network connect --alias db --ip 10.20.0.9 app c1`: {before: []string{"-rm -f c1", "network rm app", "network create --subnet 10.20.0.0/16 app", "run -d --name c1 nginx"},
		ask: `run --rm --network app alpine wget -qO- http://db/`, want: `^hello\n$`},
	`network disconnect app c1`:    {ask: `inspect -f "{{range $k, $v := .NetworkSettings.Networks}}{{$k}} {{end}}" c1`, want: `^default \n$`},
	`network disconnect -f app c1`: {before: []string{"network connect app c1"}, ask: `inspect -f "{{range $k, $v := .NetworkSettings.Networks}}{{$k}} {{end}}" c1`, want: `^default \n$`, after: []string{"rm -f c1"}},
	`network rm app`:               {ask: `network inspect app`, want: `no such network`},
	`network prune -f`:             {ask: `network ls -q --filter type=custom`, want: `^$`},

	`secret create --label a=b key docker_test.go`:       {ask: `secret inspect -f {{.Spec.Labels.a}} key`, want: `^b\n$`},
	`secret ls -q --filter name=key`:                     {says: `^\w{12}\n`},
	`secret ls --format "{{.ID}} {{.Name}}"`:             {says: `\w{12} key\n`},
	`secret inspect --pretty key`:                        {says: `Name:\s+key`},
	`secret rm key`:                                      {says: `^key\n$`, ask: `secret inspect key`, want: `no such secret`},
	`config ls --format {{.Name}}`:                       {says: `conf\n`},
	`config inspect --pretty conf`:                       {says: `package main`},
	`config inspect --format "{{json .Spec.Data}}" conf`: {says: `^"cGFja2FnZSBtYWluCg=="\n$`},
	`config rm conf`:                                     {ask: `config inspect conf`, want: `no such config`},

	`run -d --name c1 --network app nginx`:                            {ask: `run --rm --network app alpine wget -qO- http://c1/`, want: `^hello\n$`},
	`run --rm -i --network app alpine sh`:                             {in: "echo hello\nexit 0\n", says: `^hello\n$`},
	`run --rm alpine echo hello`:                                      {says: `^hello\n$`},
	`run --rm --platform linux/amd64 alpine echo hello`:               {says: `^hello\n$`},
	`run -d --restart unless-stopped --name c1 -p 8080:80 nginx`:      {ask: `port c1 80/tcp`, want: `:8080\n$`},
	`run --rm --entrypoint sh --read-only --cap-drop ALL nginx -c id`: {says: `^uid=0\(root\)`},
	`run --rm --network-alias db --network app nginx`:                 {until: `serving`},
	`run -d -P nginx`:              {before: []string{"rmi -f nginx"}, ask: `ps --format {{.Ports}}`, want: `(?m)^\*:\d+->80/tcp \(host\)$`},
	`run -d --cidfile ./cid nginx`: {},
	`ps -aq`:                       {says: `^(\w{12}\n)+$`},
	`ps --filter name=web --filter status=running`: {before: []string{"web"}, says: `web\.1`},
	`ps -f label=a=b`: {before: []string{"run -d --label a=b --name labelled nginx"}, says: `labelled`, after: []string{"rm -f labelled"}},
	`ps --format "table {{.ID}}\t{{.Names}}\t{{.Image}}\t{{.Status}}\t{{.Ports}}"`: {says: `\w{12} +c1 +nginx +`},
	`exec -it c1 sh`:                    {tty: true, in: "echo a$((1+1))b\nexit\n", says: `a2b`},
	`exec c1 ls /`:                      {says: `(?s)bin\n.*srv\n`},
	`exec -u root -w / -e A=b c1 env`:   {says: `A=b\n`},
	`exec -d c1 sleep 10`:               {ask: `top c1`, want: `sleep 10`},
	`logs c1`:                           {says: `^serving\n$`},
	`logs -f --tail 10 c1`:              {until: `serving`},
	`inspect -f "{{.State.Status}}" c1`: {says: `^running\n$`},
	`inspect --format "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}" c1`: {says: `^10\.\d+\.\d+\.\d+\n$`},
	`stop c1`:                         {ask: `inspect -f {{.State.Status}} c1`, want: `^exited\n$`},
	`stop -t 5 c1 c2`:                 {says: `^c1\nc2\n$`, after: []string{"rm c2"}},
	`start c1`:                        {ask: `inspect -f {{.State.Status}} c1`, want: `^running\n$`},
	`start -ai c1`:                    {before: []string{"rm c1", "run --name c1 alpine echo hello"}, says: `^hello\n$`, after: []string{"rm c1"}},
	`restart c1`:                      {ask: `inspect -f {{.State.Status}} c1`, want: `^running\n$`},
	`restart -t 0 -s KILL c1`:         {ask: `inspect -f {{.State.Status}} c1`, want: `^running\n$`},
	`kill -s HUP c1`:                  {ask: `inspect -f {{.State.Status}} c1`, want: `^running\n$`},
	`rm c1`:                           {before: []string{"c1", "stop c1"}, ask: `exec c1 true`, want: `no such task`},
	`rm -f c1 c2`:                     {says: `^c1\nc2\n$`},
	`rename c1 c2`:                    {before: []string{"-rm -f c2"}, ask: `ps --format {{.Names}}`, want: `(?m)^c2$`, after: []string{"rm -f c2"}},
	`cp ./docker_test.go c1:/tmp`:     {ask: `exec c1 cat /tmp/docker_test.go`, want: `^package main\n$`},
	`cp -aL c1:/var/log -`:            {says: `log/app\.log`},
	`top c1`:                          {says: `httpd`},
	`top c1 -o pid,args`:              {says: `PID +COMMAND`},
	`attach --no-stdin c1`:            {before: []string{"rm -f c1", `run -d --name c1 alpine sh -c "trap 'exit 0' INT; while :; do echo tick; sleep .1; done"`}, until: `tick`, after: []string{"-rm -f c1"}},
	`port c1`:                         {says: `^80/tcp -> 0\.0\.0\.0:8080`},
	`port c1 80/tcp`:                  {says: `^0\.0\.0\.0:8080\n$`},
	`stats --no-stream c1`:            {says: `c1`},
	`wait c1`:                         {before: []string{"kill c1"}, says: `^137\n$`},
	`info --format {{.Swarm.NodeID}}`: {says: `^\w{12}\n$`},
	`images`:                          {says: `nginx`},
	`pull nginx`:                      {says: `nginx:latest`},
	`rmi nginx`:                       {before: []string{"-rm -f c1", "-rm -f c2", "-service rm web"}, ask: `image inspect nginx`, want: `no such image`},
	`load -i nginx.tar`:               {says: `^Loaded image: .*nginx:latest\n$`},
	`volume create data`:              {ask: `volume ls -q`, want: `(?m)^data$`},
	`volume rm data`:                  {ask: `volume ls -q`, want: `(?m)^(data\d.*)?$`},
}

// dockerHub puts one image into the registry by the names that lines use: a server, or a
// shell where Docker Hub's is one.
func (r *registry) dockerHub() {
	r.Helper()
	busybox, err := os.ReadFile(needContainers(r.T))
	if err != nil {
		r.Fatal(err)
	}
	var layer []imagefile.File
	for _, d := range []string{"bin", "dev", "etc", "proc", "root", "run", "srv", "sys", "usr", "var", "var/log"} {
		layer = append(layer, imagefile.File{Name: d, Mode: 0o755})
	}
	layer = append(layer, imagefile.File{Name: "tmp", Mode: 0o1777}, imagefile.File{Name: "bin/busybox", Mode: 0o755, Data: busybox})
	for _, applet := range []string{"cat", "echo", "env", "grep", "httpd", "id", "ls", "sh", "sleep", "true", "wget"} {
		layer = append(layer, imagefile.File{Name: "bin/" + applet, Link: "busybox"})
	}
	for name, text := range map[string]string{
		"bin/curl":        "#!/bin/sh\nexec wget -qO- \"$2\"\n",
		"etc/passwd":      "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
		"etc/group":       "root:x:0:\nvideo:x:44:\nnogroup:x:65534:\n",
		"srv/index.html":  "hello\n",
		"var/log/app.log": "a line\n",
		// As the entrypoints of Docker Hub's images do: what begins with a flag is the server's.
		"entrypoint": "#!/bin/sh\ncase $1 in -*|httpd) ;; *) exec \"$@\" ;; esac\ntrap 'exit 0' INT QUIT TERM\ntrap '' HUP\necho serving\nhttpd -f -p 80 -h /srv &\nwait\n",
	} {
		layer = append(layer, imagefile.File{Name: name, Mode: 0o755, Data: []byte(text)})
	}
	env := []string{"PATH=/bin"}
	server, err := imagefile.New("amd64", map[string]any{"Entrypoint": []string{"/entrypoint"}, "Cmd": []string{"httpd"}, "Env": env, "ExposedPorts": map[string]any{"80/tcp": map[string]any{}}}, layer...)
	if err != nil {
		r.Fatal(err)
	}
	shell, err := imagefile.New("amd64", map[string]any{"Cmd": []string{"sh"}, "Env": env}, layer...)
	if err != nil {
		r.Fatal(err)
	}
	for _, name := range []string{"library/nginx:latest", "library/nginx:1.27", "library/nginx:1.28", "library/postgres:16", "library/redis:latest", "prom/node-exporter:latest",
		"team/web:1", "web:2"} { // the last two of registry.example.com, which is the same

		repo, tag, _ := strings.Cut(name, ":")
		r.push(anImage{server}, repo, tag)
	}
	for _, repo := range []string{"library/alpine", "library/busybox"} {
		r.push(anImage{shell}, repo, "latest")
	}
}

// created is the name of a service that a line makes.
var created = regexp.MustCompile(`^service create .*--name (\S+)`)

// asking are lines that change nothing.
var asking = regexp.MustCompile(`^(service|node|network|secret|config|volume|image) (ls|list|ps|inspect|logs)\b|^(ps|logs|inspect|top|port|stats|images|info|version|exec c1 ls)\b`)

// operator types lines on node1, in a directory of its own.
type operator struct {
	site
	dir   string
	there map[string]bool // things that are there, as nothing was changed since that was seen
}

// quoted takes a line apart as a shell does, but for anything but double quotes.
func quoted(line string) (out []string) {
	for i, part := range strings.Split(line, `"`) {
		if i%2 == 1 {
			out = append(out, part)
		} else {
			out = append(out, strings.Fields(part)...)
		}
	}
	return out
}

// both collects what a program says.
type both struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *both) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *both) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// types a line and returns what it said, and its exit status.
func (o operator) types(line string, how typed) (string, int) {
	o.Helper()
	args := append([]string{"shoal"}, quoted(line)...)
	if how.tty {
		args = []string{"script", "-qec", "shoal " + line, "/dev/null"}
	}
	ctx, cancel := context.WithTimeout(o.Context(), 30*time.Second)
	defer cancel()
	cmd, netns, err := o.Command(ctx, "node1", args...)
	if err != nil {
		o.Fatal(err)
	}
	var said both
	cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = o.dir, strings.NewReader(how.in), &said, &said
	// As a terminal does it: all that belongs to the line.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	interrupt := func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.Cancel, cmd.WaitDelay = interrupt, 5*time.Second
	if err := nl.Do(netns, cmd.Start); err != nil {
		o.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	if how.until == "" {
		err = <-done
	} else {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		enough := regexp.MustCompile(how.until)
		for waiting := true; waiting; {
			select {
			case err = <-done:
				waiting = false
			case <-tick.C:
				if enough.MatchString(said.String()) {
					_ = interrupt()
					err, waiting = <-done, false
				}
			}
		}
	}
	if ctx.Err() != nil {
		o.Errorf("shoal %s: it does not end", line)
	}
	var exit *exec.ExitError
	switch {
	case err == nil:
		return said.String(), 0
	case errors.As(err, &exit):
		return said.String(), exit.ExitCode()
	}
	o.Errorf("shoal %s: %v", line, err)
	return said.String(), -1
}

// prepare sees to what there must be.
func (o operator) prepare(all []string) {
	o.Helper()
	for _, l := range all {
		if thing, is := things[l]; is {
			if o.there[l] {
				continue
			}
			if _, code := o.types(thing.is, typed{}); code != 0 {
				o.prepare(thing.make)
			}
			o.there[l] = true
			continue
		}
		clear(o.there)
		l, mayFail := strings.CutPrefix(l, "-")
		if said, code := o.types(l, typed{}); code != 0 && !mayFail {
			o.Errorf("before: shoal %s: exit status %d: %s", l, code, said)
		}
	}
}

// fell3 is the end of node3, of which the managers come to know.
func (o operator) fell3() {
	if err := o.Kill(o.Context(), "node3"); err != nil {
		o.Fatal(err)
	}
	o.eventually(30*time.Second, func() error {
		if got := o.ok("node1", "shoal node ls --filter name=node3 --format {{.Status}}"); got != "down" {
			return errf("node3 is %s", got)
		}
		return nil
	})
}

// join3 makes it a node again.
func (o operator) join3() {
	if err := o.Start(o.Context(), "node3"); err != nil {
		o.Fatal(err)
	}
	o.ok("node3", "shoal leave --force")
	if err := o.Join(o.Context(), &o.Nodes()[2], false); err != nil {
		o.Fatal(err)
	}
}

// TestOperatorsLines types what an operator of a swarm types every day, with shoal for
// docker, and looks at what comes of it.
func TestOperatorsLines(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	needContainers(t, "script")
	r := withRegistry(t, "lines", lab.Options{Nodes: 3, Managers: 1, AgentArgs: []string{"--registry-mirror", "http://" + plain}})
	r.dockerHub()
	o := operator{r.site, t.TempDir(), map[string]bool{}}
	if err := os.WriteFile(filepath.Join(o.dir, "docker_test.go"), []byte("package main\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{"node1", "node2", "node3"} {
		o.ok("node1", "shoal node update --label-add disk=ssd --label-add zone=a %s", n)
	}
	b, err := os.ReadFile(filepath.Join(repo, "cmd/shoal/testdata/docker-lines.txt"))
	if err != nil {
		t.Fatal(err)
	}
	rows, unknown := maps.Clone(dockerLines), maps.Clone(dockerLines)
	if exec.Command("prlimit", "--nofile=65536:65536", "true").Run() != nil {
		rows[manyFiles] = typed{left: "this machine gives nobody so many open files"}
	}
	n := 0
	for l := range strings.Lines(string(b)) {
		line, understood := strings.CutPrefix(strings.TrimSpace(l), "+ ")
		if !understood {
			continue
		}
		how := rows[line]
		delete(unknown, line)
		if how.left != "" {
			t.Logf("left out: %s: %s", line, how.left)
			continue
		}
		n++
		var before, after []string
		for _, k := range kinds {
			if regexp.MustCompile(k.line).MatchString(line) {
				before = append(before, k.before...)
			}
		}
		began := time.Now()
		o.prepare(append(before, how.before...))
		if how.first != nil {
			how.first(o)
		}
		ready := time.Now()
		if !asking.MatchString(line) {
			clear(o.there)
		}
		said, code := o.types(line, how)
		t.Logf("%4d %4d ms  %s", ready.Sub(began).Milliseconds(), time.Since(ready).Milliseconds(), line)
		if how.until == "" && code != 0 {
			t.Errorf("shoal %s: exit status %d: %s", line, code, said)
		}
		if !regexp.MustCompile(how.says).MatchString(said) {
			t.Errorf("shoal %s: it says %q, want %s", line, said, how.says)
		}
		if how.ask != "" {
			if got, _ := o.types(how.ask, typed{}); !regexp.MustCompile(how.want).MatchString(got) {
				t.Errorf("shoal %s: afterwards shoal %s: %q, want %s", line, how.ask, got, how.want)
			}
		}
		if m := created.FindStringSubmatch(line); m != nil {
			after = append(after, "service rm "+m[1])
		}
		if id := strings.TrimSpace(said); strings.HasPrefix(line, "run -d") && !strings.Contains(line, "--name") {
			after = append(after, "rm -f "+id)
		}
		o.prepare(append(after, how.after...))
	}
	for _, l := range slices.Sorted(maps.Keys(unknown)) {
		t.Errorf("%s: is no line of docker-lines.txt", l)
	}
	if n == 0 {
		t.Error("no lines")
	}
}
