-- Open a new epoch by compare-and-set. KEYS: meta, epoch, log.
-- ARGV: number and nonce of the epoch that the caller saw ("" if none), the new nonce, the caller's promise (a number),
-- entry id, region, whether the caller may start a log that does not exist ("1"), and for that: incarnation, format,
-- max_token_lifetime_s.
-- Returns {"bumped", number}, {"lost"} if the epoch is another one by now, or {"waiting"} if there is no log to bump.
local replid, refusal = master_replid()
if not replid then
  return refusal
end

local held = redis.call('HMGET', KEYS[2], 'number', 'nonce', 'chain')
local number, nonce, chain = held[1] or '', held[2] or '', held[3] or '[]'
if number ~= ARGV[1] or nonce ~= ARGV[2] then
  return {'lost'}
end

if redis.call('EXISTS', KEYS[1]) == 0 then
  if ARGV[7] ~= '1' then
    return {'waiting'}
  end
  redis.call('HSET', KEYS[1], 'incarnation', ARGV[8], 'trimmed_to', '', 'writer_format', ARGV[9],
    'min_reader_format', ARGV[9], 'max_token_lifetime_s', ARGV[10])
end

local now_ms = server_ms()
local last = redis.call('XREVRANGE', KEYS[3], '+', '-', 'COUNT', 1)[1]
local last_number = last and string.match(last[1], '^(%d+)-') or '0'
local following = string.format('%.0f', math.max(
  tonumber(number ~= '' and number or '0') + 1, tonumber(ARGV[4]) + 1, tonumber(last_number) + 1, tonumber(now_ms)))

-- The last position before this epoch, with the nonce that its epoch has in this history.
local previous = '-'
if last then
  for _, link in ipairs(cjson.decode(chain)) do
    if string.format('%.0f', link.number) == last_number then
      previous = last[1] .. '.' .. link.nonce
    end
  end
end

local previous_json = previous == '-' and 'null' or '"' .. previous .. '"'
local link = '{"number":' .. following .. ',"nonce":"' .. ARGV[3] .. '","previous":' .. previous_json
  .. ',"voters":{},"opened":false}'
local links = string.match(chain, '^%[(.*)%]$') or ''
if links ~= '' then
  links = links .. ','
end

redis.call('XADD', KEYS[3], following .. '-0', 'v', '1', 'id', ARGV[5], 'kind', 'epoch', 'issuer', '',
  'value', ARGV[3] .. ' ' .. previous, 'before', '', 'expires_at', '0', 'reason', '', 'at', now_ms, 'region', ARGV[6])
redis.call('HSET', KEYS[2], 'number', following, 'nonce', ARGV[3], 'replid', replid, 'open', '0', 'keys_n', '0',
  'chain', '[' .. links .. link .. ']')
return {'bumped', following}
